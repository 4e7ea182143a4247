"""The admin port: what an operator may see and do, and the console that shows it."""
