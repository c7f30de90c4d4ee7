"""What the app shows and says: words in two languages, looks, HTML, and a microphone that is heard while it is open."""
