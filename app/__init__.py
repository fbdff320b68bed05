"""The browser front end. It knows runs by their folders and never imports torch."""
