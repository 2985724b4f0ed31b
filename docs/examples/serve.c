// Runs a TensorFlow model that has deformable convolutions, without Python. See docs/serving.md.
//
//   serve LIBRARY MODEL INPUT OUTPUT INPUT_FILE OUTPUT_FILE SIZE...
//
// LIBRARY      libdeform_conv.so for the TensorFlow that this program is linked with
// MODEL        the folder of a SavedModel, or the file of a frozen GraphDef
// INPUT        tensor to feed, such as "serving_default_images:0"
// OUTPUT       tensor to fetch, such as "StatefulPartitionedCall:0"
// INPUT_FILE   the input's numbers, float32 as this machine has them, the last dimension fastest
// OUTPUT_FILE  gets the output's numbers in the same form; the shape is printed
// SIZE...      the input's shape, such as 8 28 28 3

#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#include "tensorflow/c/c_api.h"

enum { kMaxRank = 8, kMaxName = 256 };

static void Fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fputs("serve: error: ", stderr);
  vfprintf(stderr, format, arguments);
  fputc('\n', stderr);
  va_end(arguments);
  exit(EXIT_FAILURE);
}

static void Check(const TF_Status* status, const char* what) {
  if (TF_GetCode(status) != TF_OK) Fail("%s: %s", what, TF_Message(status));
}

static struct stat Entry(const char* path) {
  struct stat entry;
  if (stat(path, &entry) != 0) Fail("%s: not found", path);
  return entry;
}

// Reads the first `size` bytes of a file.
static void ReadFile(const char* path, void* data, size_t size) {
  FILE* file = fopen(path, "rb");
  if (file == NULL || fread(data, 1, size, file) != size) Fail("%s: cannot be read", path);
  fclose(file);
}

static void WriteFile(const char* path, const void* data, size_t size) {
  FILE* file = fopen(path, "wb");
  if (file == NULL || fwrite(data, 1, size, file) != size || fclose(file) != 0) {
    Fail("%s: cannot be written", path);
  }
}

static void ImportGraph(const char* path, TF_Graph* graph, TF_Status* status) {
  const size_t size = (size_t)Entry(path).st_size;
  void* data = malloc(size + 1);
  if (data == NULL) Fail("%s: no memory for %zu bytes", path, size);
  ReadFile(path, data, size);
  TF_Buffer* graph_def = TF_NewBufferFromString(data, size);
  TF_ImportGraphDefOptions* options = TF_NewImportGraphDefOptions();
  TF_GraphImportGraphDef(graph, graph_def, options, status);
  Check(status, path);
  TF_DeleteImportGraphDefOptions(options);
  TF_DeleteBuffer(graph_def);
  free(data);
}

// A session of a model, whose operations are added to `graph`.
static TF_Session* LoadModel(const char* path, TF_Graph* graph, TF_Status* status) {
  TF_SessionOptions* options = TF_NewSessionOptions();
  TF_Session* session;
  if (S_ISDIR(Entry(path).st_mode)) {
    const char* const tags[] = {"serve"};
    session = TF_LoadSessionFromSavedModel(options, NULL, path, tags, 1, graph, NULL, status);
  } else {
    ImportGraph(path, graph, status);
    session = TF_NewSession(graph, options, status);
  }
  Check(status, path);
  TF_DeleteSessionOptions(options);
  return session;
}

// The float32 tensor of a graph that is named "operation:index".
static TF_Output FindTensor(TF_Graph* graph, const char* name) {
  char operation[kMaxName];
  int index;
  if (strlen(name) >= kMaxName || sscanf(name, "%[^:]:%d", operation, &index) != 2) {
    Fail("%s: not the name of a tensor, such as operation:0", name);
  }
  const TF_Output tensor = {TF_GraphOperationByName(graph, operation), index};
  if (tensor.oper == NULL || index < 0 || index >= TF_OperationNumOutputs(tensor.oper)) {
    Fail("%s: the model has no such tensor", name);
  }
  if (TF_OperationOutputType(tensor) != TF_FLOAT) Fail("%s: not float32", name);
  return tensor;
}

// A tensor of the numbers in a file.
static TF_Tensor* ReadTensor(const char* path, int rank, char* const sizes[]) {
  int64_t shape[kMaxRank];
  int64_t bytes = sizeof(float);
  if (rank > kMaxRank) Fail("%d dimensions; %d are the most", rank, kMaxRank);
  for (int i = 0; i < rank; ++i) {
    char* end;
    shape[i] = strtoll(sizes[i], &end, 10);
    if (*end != '\0' || shape[i] <= 0 || shape[i] > INT64_MAX / bytes) {
      Fail("%s: not a size", sizes[i]);
    }
    bytes *= shape[i];
  }
  const int64_t found = Entry(path).st_size;
  if (found != bytes) Fail("%s: %jd bytes; expected %jd", path, (intmax_t)found, (intmax_t)bytes);
  TF_Tensor* tensor = TF_AllocateTensor(TF_FLOAT, shape, rank, (size_t)bytes);
  if (tensor == NULL) Fail("%s: no memory for %jd bytes", path, (intmax_t)bytes);
  ReadFile(path, TF_TensorData(tensor), (size_t)bytes);
  return tensor;
}

int main(int argc, char* argv[]) {
  if (argc < 7) Fail("usage: serve LIBRARY MODEL INPUT OUTPUT INPUT_FILE OUTPUT_FILE SIZE...");
  TF_Status* status = TF_NewStatus();

  // Before the model, which has the op's name only. It is the library's to find its core beside it.
  TF_Library* library = TF_LoadLibrary(argv[1], status);
  Check(status, argv[1]);

  TF_Graph* graph = TF_NewGraph();
  TF_Session* session = LoadModel(argv[2], graph, status);
  const TF_Output input = FindTensor(graph, argv[3]);
  const TF_Output output = FindTensor(graph, argv[4]);

  TF_Tensor* images = ReadTensor(argv[5], argc - 7, argv + 7);
  TF_Tensor* result = NULL;
  TF_SessionRun(session, NULL, &input, &images, 1, &output, &result, 1, NULL, 0, NULL, status);
  Check(status, "run");

  WriteFile(argv[6], TF_TensorData(result), TF_TensorByteSize(result));
  for (int i = 0; i < TF_NumDims(result); ++i) printf("%jd ", (intmax_t)TF_Dim(result, i));
  printf("\n");

  TF_DeleteTensor(result);
  TF_DeleteTensor(images);
  TF_CloseSession(session, status);
  Check(status, "close");
  TF_DeleteSession(session, status);
  Check(status, "delete");
  TF_DeleteGraph(graph);
  // The ops stay registered: this frees the handle and does not unload the library.
  TF_DeleteLibraryHandle(library);
  TF_DeleteStatus(status);
  return EXIT_SUCCESS;
}
