"""The report: one HTML file that says what was built, whether it is good enough, and how that is known."""
