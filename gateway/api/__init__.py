"""The HTTP interface: routes, schemas, uploads and the middleware around them."""
