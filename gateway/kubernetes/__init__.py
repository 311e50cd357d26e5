"""The Kubernetes API: a small client, and the traffic plan as a ConfigMap that is read by watch."""
