"""The control centre: a process that reads the ledger, shows it in a browser, and gives orders. Killing it costs
nothing."""
