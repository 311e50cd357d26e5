"""Everything on one machine: processes started together and restarted."""
