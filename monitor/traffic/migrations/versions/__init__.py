"""Every version of the tables. One that has been released never changes again."""
