"""One record a device, found by the core through entry points."""
