"""The casts again, fast: one file for each kind of device, each equal to `octavo.reference` bit for bit."""
