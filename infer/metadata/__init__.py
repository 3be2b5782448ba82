"""Descriptions in images' own metadata: XMP packets, what an image holds already, and writing through exiftool."""
