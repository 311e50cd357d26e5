"""Gunicorn for the gateway: `gunicorn -c config/gunicorn.conf.py 'gateway.app:create_app()'`.

Everything comes from the gateway's own settings (`GATEWAY_*`), so that there is one place to set a thing.
"""

from gateway.settings import load_settings

_settings = load_settings()

bind = f"{_settings.host}:{_settings.port}"
workers = _settings.workers
worker_class = "uvicorn_worker.UvicornWorker"
keepalive = _settings.keep_alive_s
# A worker that does not answer the master for this long is killed; the event loop is never blocked for seconds.
timeout = 30
# After SIGTERM: time to drain, then as long as the longest request may take, and a little.
graceful_timeout = int(_settings.drain_s + _settings.timeout_s + _settings.body_timeout_s) + 5
forwarded_allow_ips = ",".join(_settings.trusted_proxies)
loglevel = _settings.log_level
