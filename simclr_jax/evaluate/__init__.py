"""What an encoder is worth: one file for each protocol."""
