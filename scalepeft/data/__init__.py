"""From files of rows to tokens of samples."""
