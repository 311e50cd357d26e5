"""The Gunicorn worker and its HTTP protocol with limits."""
