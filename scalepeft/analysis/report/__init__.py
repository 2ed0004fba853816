"""One run or several as HTML, Markdown and a terminal table."""
