"""Data sets from elsewhere, brought into the formats that data.py reads."""
