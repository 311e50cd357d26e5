"""The HTTP surface: routes, schemas, uploads and the middleware around them."""
