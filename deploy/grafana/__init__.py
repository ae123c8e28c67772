"""The Grafana dashboards, as code; see `__main__`."""
