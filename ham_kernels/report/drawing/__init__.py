"""The numbers of data.json to figures; loads matplotlib."""
