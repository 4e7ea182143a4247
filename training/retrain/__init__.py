"""`midstream retrain`: labels of live traffic to a candidate in the store."""
