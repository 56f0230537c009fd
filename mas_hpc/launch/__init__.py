"""From a configuration to a running job on a site."""
