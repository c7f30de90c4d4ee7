"""Recordings at http(s) addresses: which addresses are allowed, and downloads with limits.

urls           the parts of a URL, its printable form without secrets, a safe file name
addresses      which IP addresses are public; connections to checked addresses only
download       redirects, limits in bytes and seconds, continued downloads
video_pages    pages with a video, by yt-dlp
"""
