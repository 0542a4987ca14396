"""``python -m nextlat``."""

from nextlat.cli import main

main()
