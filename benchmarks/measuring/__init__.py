"""What every benchmark needs: pictures, commands and their cost, figures, bars, tables and JSON."""
