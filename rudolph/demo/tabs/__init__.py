"""The tabs of the demo: one file of widgets per tab."""
