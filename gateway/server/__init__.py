"""The Gunicorn worker and its protocol guards."""
