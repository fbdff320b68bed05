"""From folders of images and captions to what one step trains on."""
