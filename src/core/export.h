// What of the core's library can be called from outside.

#ifndef DEFORM_CONV_CORE_EXPORT_H_
#define DEFORM_CONV_CORE_EXPORT_H_

// On the declaration of a function, and of a type that templates with it are instantiated for.
#define DEFORM_CONV_EXPORT __attribute__((visibility("default")))

#endif  // DEFORM_CONV_CORE_EXPORT_H_
