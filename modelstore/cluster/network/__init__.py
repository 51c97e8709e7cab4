"""Between processes: how actors are named and asked, connections that prove who speaks, pieces over TCP."""
