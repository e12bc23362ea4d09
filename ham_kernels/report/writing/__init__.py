"""The numbers of data.json to tables and a page."""
