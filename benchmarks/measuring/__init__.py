"""What every benchmark needs: images, commands and their cost, figures, bars, tables and JSON."""
