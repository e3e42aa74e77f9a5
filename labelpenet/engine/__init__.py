"""Training for any module: it knows neither our modules nor any format of a data set."""
