"""Files of other programs: their headers, their names, and where a folder keeps its weights."""
