"""Devices that are reached over ssh: what runs there, what comes back, and how it is read here."""
