"""One file for each page; a page knows no other page."""
