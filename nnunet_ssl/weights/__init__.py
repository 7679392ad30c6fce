"""What checkpoint files hold: recognise, read, convert, report, fetch; nothing in them is ever run."""
