"""The Gunicorn worker, its HTTP protocol with limits, and its acceptor."""
