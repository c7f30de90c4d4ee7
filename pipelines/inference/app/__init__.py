"""What the app shows and says: words in two languages, looks, HTML; a microphone that is heard while it is open, and
the door before all of it."""
