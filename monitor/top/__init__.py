"""`midstream top`: a server's /metrics, read again and again, as one screen."""
