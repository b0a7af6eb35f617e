"""Any table of events to a data folder."""
