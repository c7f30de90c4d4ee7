"""Components that several pages of the lab have: texts in two languages, the head of a page, the recorder."""
