// Products of numbers in floating point, for what has no exact sum of whole numbers: block formats, two 8-bit floats.
#include "numbers_tile.inc.cpp"

#include "numbers_matmul.inc.cpp"

#include "numbers_conv.inc.cpp"

#include "numbers_weight.inc.cpp"
