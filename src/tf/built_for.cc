// Which TensorFlow a library was built for: the Python package looks for this text in the file,
// since a library that does not fit must not even be loaded.

extern "C" __attribute__((used)) const char deform_conv_built_for[] =
    "lib" DEFORM_CONV_LIBRARY_NAME " was built for TensorFlow " DEFORM_CONV_TENSORFLOW_VERSION;
