"""Self-contained pages: one HTML file each, without network, that draws what a command found."""
