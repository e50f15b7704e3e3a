// pipeline_statistics: compiles compute shaders with the first Vulkan device's driver and prints what the driver says of them
// (VK_KHR_pipeline_executable_properties): registers, spills, instructions. Nothing is submitted, so a driver that only pretends
// to have its GPU will do.
//
// usage:  pipeline_statistics FILE.spv...    each with one entry point; a few hundred a call, after that Mesa's pretended GPUs crash
// prints  FILE<TAB>STATISTIC<TAB>VALUE       a line for each statistic; `error` as the statistic where the driver refuses the shader
// build:  cc -O1 -o pipeline_statistics pipeline_statistics.c -lvulkan

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <vulkan/vulkan.h>

enum { MOST_BINDINGS = 64, MOST_FEATURES = 8 };

// SPIR-V's numbers for the few things read here.
enum {
  OP_ENTRY_POINT = 15,
  OP_VARIABLE = 59,
  OP_DECORATE = 71,
  DECORATION_BINDING = 33,
  STORAGE_CLASS_UNIFORM = 2,
};

typedef struct {
  uint32_t *words;
  size_t bytes;
  const char *entry;
  VkDescriptorSetLayoutBinding bindings[MOST_BINDINGS];
  uint32_t binding_count;
} Shader;

static void check(VkResult result, const char *what) {
  if (result < 0) {
    fprintf(stderr, "pipeline_statistics: %s: VkResult %d\n", what, result);
    exit(2);
  }
}

static void *allocate(size_t count, size_t size) {
  void *memory = calloc(count ? count : 1, size);
  if (!memory) {
    fprintf(stderr, "pipeline_statistics: out of memory\n");
    exit(2);
  }
  return memory;
}

static bool read_words(const char *path, Shader *shader) {
  FILE *file = fopen(path, "rb");
  if (!file) return false;
  fseek(file, 0, SEEK_END);
  long bytes = ftell(file);
  rewind(file);
  shader->bytes = bytes > 0 ? (size_t)bytes : 0;
  shader->words = allocate(shader->bytes + 4, 1);
  bool complete = shader->bytes >= 20 && shader->bytes % 4 == 0 && fread(shader->words, 1, shader->bytes, file) == shader->bytes;
  fclose(file);
  return complete;
}

// Finds the entry point's name, and which bindings there are. All are in group 0, as wgpu lays out a kernel of ours.
static bool reflect(Shader *shader) {
  const uint32_t *words = shader->words;
  size_t count = shader->bytes / 4;
  uint32_t bound = words[3];
  int64_t *binding_of = allocate(bound, sizeof *binding_of);
  for (uint32_t id = 0; id < bound; id++) binding_of[id] = -1;
  for (size_t at = 5; at < count;) {
    uint32_t op = words[at] & 0xffff, length = words[at] >> 16;
    if (length == 0 || at + length > count) return false;
    if (op == OP_ENTRY_POINT && length > 3) shader->entry = (const char *)&words[at + 3];
    if (op == OP_DECORATE && length == 4 && words[at + 2] == DECORATION_BINDING && words[at + 1] < bound)
      binding_of[words[at + 1]] = words[at + 3];
    if (op == OP_VARIABLE && words[at + 2] < bound && binding_of[words[at + 2]] >= 0) {
      if (shader->binding_count == MOST_BINDINGS) return false;
      shader->bindings[shader->binding_count++] = (VkDescriptorSetLayoutBinding){
        .binding = (uint32_t)binding_of[words[at + 2]],
        .descriptorType = words[at + 3] == STORAGE_CLASS_UNIFORM ? VK_DESCRIPTOR_TYPE_UNIFORM_BUFFER_DYNAMIC : VK_DESCRIPTOR_TYPE_STORAGE_BUFFER,
        .descriptorCount = 1,
        .stageFlags = VK_SHADER_STAGE_COMPUTE_BIT,
      };
    }
    at += length;
  }
  free(binding_of);
  return shader->entry != NULL;
}

static bool has_extension(VkPhysicalDevice physical, const char *name) {
  uint32_t count = 0;
  vkEnumerateDeviceExtensionProperties(physical, NULL, &count, NULL);
  VkExtensionProperties *known = allocate(count, sizeof *known);
  vkEnumerateDeviceExtensionProperties(physical, NULL, &count, known);
  bool found = false;
  for (uint32_t i = 0; i < count; i++) found |= strcmp(known[i].extensionName, name) == 0;
  free(known);
  return found;
}

// A device with everything on that the driver has, robust buffer access among it, as wgpu opens it.
static VkDevice open_device(VkPhysicalDevice physical) {
  VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR executable = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PIPELINE_EXECUTABLE_PROPERTIES_FEATURES_KHR};
  VkPhysicalDeviceRobustness2FeaturesEXT robustness = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ROBUSTNESS_2_FEATURES_EXT, .pNext = &executable};
  VkPhysicalDeviceVulkan13Features vulkan13 = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_3_FEATURES, .pNext = &executable};
  VkPhysicalDeviceVulkan12Features vulkan12 = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_2_FEATURES, .pNext = &vulkan13};
  VkPhysicalDeviceVulkan11Features vulkan11 = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_VULKAN_1_1_FEATURES, .pNext = &vulkan12};
  VkPhysicalDeviceFeatures2 features = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, .pNext = &vulkan11};
  const char *extensions[2] = {VK_KHR_PIPELINE_EXECUTABLE_PROPERTIES_EXTENSION_NAME};
  uint32_t extension_count = 1;
  if (has_extension(physical, VK_EXT_ROBUSTNESS_2_EXTENSION_NAME)) {
    extensions[extension_count++] = VK_EXT_ROBUSTNESS_2_EXTENSION_NAME;
    vulkan13.pNext = &robustness;
  }
  vkGetPhysicalDeviceFeatures2(physical, &features);
  if (!executable.pipelineExecutableInfo) {
    fprintf(stderr, "pipeline_statistics: this driver has no statistics\n");
    exit(2);
  }
  float priority = 1;
  VkDeviceQueueCreateInfo queue = {.sType = VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, .queueCount = 1, .pQueuePriorities = &priority};
  VkDeviceCreateInfo info = {
    .sType = VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO,
    .pNext = &features,
    .queueCreateInfoCount = 1,
    .pQueueCreateInfos = &queue,
    .enabledExtensionCount = extension_count,
    .ppEnabledExtensionNames = extensions,
  };
  VkDevice device;
  check(vkCreateDevice(physical, &info, NULL, &device), "vkCreateDevice");
  return device;
}

static VkResult compile(VkDevice device, const Shader *shader, VkPipeline *pipeline) {
  VkDescriptorSetLayoutCreateInfo set_info = {
    .sType = VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO,
    .bindingCount = shader->binding_count,
    .pBindings = shader->bindings,
  };
  VkDescriptorSetLayout set;
  check(vkCreateDescriptorSetLayout(device, &set_info, NULL, &set), "vkCreateDescriptorSetLayout");
  VkPipelineLayoutCreateInfo layout_info = {.sType = VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO, .setLayoutCount = 1, .pSetLayouts = &set};
  VkPipelineLayout layout;
  check(vkCreatePipelineLayout(device, &layout_info, NULL, &layout), "vkCreatePipelineLayout");
  VkShaderModuleCreateInfo module_info = {.sType = VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO, .codeSize = shader->bytes, .pCode = shader->words};
  VkShaderModule module;
  VkResult result = vkCreateShaderModule(device, &module_info, NULL, &module);
  if (result >= 0) {
    VkComputePipelineCreateInfo info = {
      .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
      .flags = VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR,
      .stage = {
        .sType = VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO,
        .stage = VK_SHADER_STAGE_COMPUTE_BIT,
        .module = module,
        .pName = shader->entry,
      },
      .layout = layout,
    };
    result = vkCreateComputePipelines(device, VK_NULL_HANDLE, 1, &info, NULL, pipeline);
    vkDestroyShaderModule(device, module, NULL);
  }
  vkDestroyPipelineLayout(device, layout, NULL);
  vkDestroyDescriptorSetLayout(device, set, NULL);
  return result;
}

static void print_statistics(VkDevice device, VkPipeline pipeline, const char *path) {
  PFN_vkGetPipelineExecutableStatisticsKHR statistics_of =
    (PFN_vkGetPipelineExecutableStatisticsKHR)vkGetDeviceProcAddr(device, "vkGetPipelineExecutableStatisticsKHR");
  // A compute pipeline is one executable.
  VkPipelineExecutableInfoKHR which = {.sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR, .pipeline = pipeline};
  uint32_t count = 0;
  check(statistics_of(device, &which, &count, NULL), "vkGetPipelineExecutableStatisticsKHR");
  VkPipelineExecutableStatisticKHR *all = allocate(count, sizeof *all);
  for (uint32_t i = 0; i < count; i++) all[i].sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR;
  check(statistics_of(device, &which, &count, all), "vkGetPipelineExecutableStatisticsKHR");
  for (uint32_t i = 0; i < count; i++) {
    printf("%s\t%s\t", path, all[i].name);
    switch (all[i].format) {
      case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_BOOL32_KHR: printf("%u\n", all[i].value.b32); break;
      case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_INT64_KHR: printf("%lld\n", (long long)all[i].value.i64); break;
      case VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_UINT64_KHR: printf("%llu\n", (unsigned long long)all[i].value.u64); break;
      default: printf("%g\n", all[i].value.f64);
    }
  }
  free(all);
}

int main(int count_of_arguments, char **arguments) {
  VkApplicationInfo application = {.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO, .apiVersion = VK_API_VERSION_1_3};
  VkInstanceCreateInfo instance_info = {.sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO, .pApplicationInfo = &application};
  VkInstance instance;
  check(vkCreateInstance(&instance_info, NULL, &instance), "vkCreateInstance");
  VkPhysicalDevice physical;
  uint32_t count = 1;
  check(vkEnumeratePhysicalDevices(instance, &count, &physical), "vkEnumeratePhysicalDevices");
  if (count == 0) {
    fprintf(stderr, "pipeline_statistics: the driver shows no device\n");
    return 2;
  }
  VkPhysicalDeviceProperties properties;
  vkGetPhysicalDeviceProperties(physical, &properties);
  printf("\tdevice\t%s\n", properties.deviceName);
  VkDevice device = open_device(physical);

  for (int i = 1; i < count_of_arguments; i++) {
    const char *path = arguments[i];
    Shader shader = {0};
    if (!read_words(path, &shader) || !reflect(&shader)) {
      printf("%s\terror\tnot SPIR-V that can be read\n", path);
    } else {
      VkPipeline pipeline = VK_NULL_HANDLE;
      VkResult result = compile(device, &shader, &pipeline);
      if (result < 0) {
        printf("%s\terror\tthe driver refuses it (VkResult %d)\n", path, result);
      } else {
        print_statistics(device, pipeline, path);
        vkDestroyPipeline(device, pipeline, NULL);
      }
    }
    free(shader.words);
    fflush(stdout);
  }
  return 0;
}
