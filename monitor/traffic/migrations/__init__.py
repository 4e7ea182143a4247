"""Alembic's: `env` runs `versions`, in order, on the connection that the log has open."""
