/*
 * A libnvidia-ml.so.1 for machines without a GPU: the functions that daemon/finetuned/gpu.py calls.
 *
 * Every call reads the file named by $FAKE_NVML_SCENARIO anew, so a test changes the GPUs under a
 * running process by replacing that file. One key=value a line; the last line of a key counts.
 *
 *   init=driver_not_loaded          what nvmlInit says
 *   gpus=2                          how many GPUs, 0 to 8; 1 unless said
 *   0.name=NVIDIA H100              what GPU 0 answers, in NVML's own units:
 *   0.memory_total= 0.memory_used=  bytes
 *   0.utilization= 0.temperature=   percent, degrees Celsius
 *   0.power= 0.energy=              milliwatts, millijoules since the driver was loaded
 *   0.sm_clock= 0.memory_clock=     MHz
 *   0.throttle_reasons=             NVML's bits
 *   0.ecc_errors= 0.remapped_rows=  counts
 *   0.process.1234=                 bytes of process 1234; one line an instance; "none": not known
 *   0.xid=79                        one Xid event, whenever the value changes
 *   0.lost=1                        from now on GPU 0 answers everything with "GPU is lost"
 *   0.events=not_supported          GPU 0 has no events
 *   0.handle=no_permission          GPU 0 is counted, but it cannot be opened
 *
 * Instead of a number, a field may be the name of an error from `errors` below. To build a library
 * that lacks a function, rename it: gcc -DnvmlDeviceGetPowerUsage=absent_1.
 */

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SUCCESS = 0, INVALID_ARGUMENT = 2, INSUFFICIENT_SIZE = 7, TIMEOUT = 10, GPU_IS_LOST = 15 };
enum { MOST_GPUS = 8, LINE = 256, SM_CLOCK = 1 };

static const struct { const char *name; int code; } errors[] = {
    {"not_supported", 3}, {"no_permission", 4},   {"driver_not_loaded", 9}, {"lost", GPU_IS_LOST},
    {"reset_required", 16}, {"version_mismatch", 18}, {"unknown", 999},
};

typedef struct { unsigned index; unsigned long long told_xid; } device;
typedef struct { device *of; } event_set;
typedef unsigned long long number;

static device devices[MOST_GPUS];

typedef struct { number total, free, used; } memory_info;
typedef struct { unsigned gpu, memory; } utilization;
typedef struct { unsigned version, sensor; int temperature; } temperature_v1;
typedef struct { unsigned pid; number used; unsigned gpu_instance, compute_instance; } process_info;
typedef struct { device *of; number type, data; unsigned gpu_instance, compute_instance; } event;

/* Calls `each` for the value of every line whose key begins with `key`; `rest` is the key's end. */
typedef void visitor(const char *rest, const char *value, void *context);

static void scan(const char *key, visitor *each, void *context) {
    const char *path = getenv("FAKE_NVML_SCENARIO");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[LINE];
    while (file && fgets(line, sizeof line, file)) {
        char *value = strchr(line, '=');
        if (!value || strncmp(line, key, strlen(key))) continue;
        *value++ = '\0';
        value[strcspn(value, "\r\n")] = '\0';
        each(line + strlen(key), value, context);
    }
    if (file) fclose(file);
}

static void keep(const char *rest, const char *value, void *kept) {
    if (!*rest) snprintf(kept, LINE, "%s", value);
}

/* Gives the text of a key, or `otherwise`. */
static void text(const char *key, const char *otherwise, char *value) {
    snprintf(value, LINE, "%s", otherwise);
    scan(key, keep, value);
}

static int error_named(const char *name) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (!strcmp(name, errors[i].name)) return errors[i].code;
    return SUCCESS;
}

static int field_text(const device *gpu, const char *field, const char *otherwise, char *value) {
    char key[LINE];
    snprintf(key, sizeof key, "%u.lost", gpu->index);
    text(key, "0", value);
    if (strcmp(value, "0")) return GPU_IS_LOST;
    snprintf(key, sizeof key, "%u.%s", gpu->index, field);
    text(key, otherwise, value);
    return error_named(value);
}

static int field(const device *gpu, const char *name, const char *otherwise, number *value) {
    char words[LINE];
    int error = field_text(gpu, name, otherwise, words);
    *value = strtoull(words, NULL, 0);
    return error;
}

static int small_field(const device *gpu, const char *name, const char *otherwise, unsigned *value) {
    number wide;
    int error = field(gpu, name, otherwise, &wide);
    *value = (unsigned)wide;
    return error;
}

int nvmlInitWithFlags(unsigned flags) {
    char words[LINE];
    (void)flags;
    text("init", "", words);
    return error_named(words);
}

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count) {
    char words[LINE];
    text("gpus", "1", words);
    *count = (unsigned)atoi(words);
    return *count > MOST_GPUS ? INVALID_ARGUMENT : SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device **gpu) {
    char words[LINE];
    if (index >= MOST_GPUS) return INVALID_ARGUMENT;
    devices[index].index = index;
    *gpu = &devices[index];
    return field_text(*gpu, "handle", "", words);
}

int nvmlDeviceGetUUID(device *gpu, char *uuid, unsigned size) {
    char otherwise[LINE], words[LINE];
    snprintf(otherwise, sizeof otherwise, "GPU-00000000-0000-0000-0000-%012u", gpu->index);
    int error = field_text(gpu, "uuid", otherwise, words);
    snprintf(uuid, size, "%s", words);
    return error;
}

int nvmlDeviceGetName(device *gpu, char *name, unsigned size) {
    char words[LINE];
    int error = field_text(gpu, "name", "NVIDIA H100", words);
    snprintf(name, size, "%s", words);
    return error;
}

int nvmlDeviceGetMemoryInfo(device *gpu, memory_info *memory) {
    int error = field(gpu, "memory_total", "85899345920", &memory->total);
    if (error == SUCCESS) error = field(gpu, "memory_used", "0", &memory->used);
    memory->free = memory->total - memory->used;
    return error;
}

int nvmlDeviceGetUtilizationRates(device *gpu, utilization *rates) {
    rates->memory = 0;
    return small_field(gpu, "utilization", "0", &rates->gpu);
}

int nvmlDeviceGetPowerUsage(device *gpu, unsigned *milliwatts) {
    return small_field(gpu, "power", "70000", milliwatts);
}

int nvmlDeviceGetTotalEnergyConsumption(device *gpu, number *millijoules) {
    return field(gpu, "energy", "0", millijoules);
}

int nvmlDeviceGetTemperatureV(device *gpu, temperature_v1 *reading) {
    number celsius;
    int error = field(gpu, "temperature", "35", &celsius);
    reading->temperature = (int)celsius;
    return error;
}

int nvmlDeviceGetTemperature(device *gpu, unsigned sensor, unsigned *celsius) {
    (void)sensor;
    return small_field(gpu, "temperature", "35", celsius);
}

int nvmlDeviceGetClockInfo(device *gpu, unsigned clock, unsigned *mhz) {
    return clock == SM_CLOCK ? small_field(gpu, "sm_clock", "345", mhz)
                             : small_field(gpu, "memory_clock", "2619", mhz);
}

int nvmlDeviceGetCurrentClocksEventReasons(device *gpu, number *bits) {
    return field(gpu, "throttle_reasons", "1", bits);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device *gpu, number *bits) {
    return field(gpu, "throttle_reasons", "1", bits);
}

int nvmlDeviceGetTotalEccErrors(device *gpu, unsigned kind, unsigned since, number *count) {
    (void)kind, (void)since;
    return field(gpu, "ecc_errors", "0", count);
}

int nvmlDeviceGetRemappedRows(device *gpu, unsigned *corrected, unsigned *uncorrected,
                              unsigned *pending, unsigned *failed) {
    *corrected = *pending = *failed = 0;
    return small_field(gpu, "remapped_rows", "0", uncorrected);
}

struct listing { process_info *rows; unsigned room, count; };

static void list_process(const char *pid, const char *bytes, void *context) {
    struct listing *list = context;
    if (list->count < list->room)
        list->rows[list->count] = (process_info){
            .pid = (unsigned)atoi(pid),
            .used = strcmp(bytes, "none") ? strtoull(bytes, NULL, 0) : (number)-1,
        };
    list->count++;
}

int nvmlDeviceGetComputeRunningProcesses_v3(device *gpu, unsigned *count, process_info *rows) {
    char key[LINE], words[LINE];
    struct listing list = {rows, rows ? *count : 0, 0};
    int error = field_text(gpu, "processes", "", words);
    if (error) return error;
    snprintf(key, sizeof key, "%u.process.", gpu->index);
    scan(key, list_process, &list);
    *count = list.count;
    return list.count > list.room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlEventSetCreate(event_set **set) {
    *set = calloc(1, sizeof **set);
    return SUCCESS;
}

int nvmlEventSetFree(event_set *set) {
    free(set);
    return SUCCESS;
}

int nvmlDeviceRegisterEvents(device *gpu, number types, event_set *set) {
    char words[LINE];
    (void)types;
    set->of = gpu;
    return field_text(gpu, "events", "", words);
}

/* A lost GPU still has its Xid to tell: it is what says why the GPU was lost. */
int nvmlEventSetWait_v2(event_set *set, event *told, unsigned milliseconds) {
    char key[LINE], words[LINE];
    (void)milliseconds;
    snprintf(key, sizeof key, "%u.xid", set->of->index);
    text(key, "0", words);
    number xid = strtoull(words, NULL, 0);
    if (xid != set->of->told_xid && (set->of->told_xid = xid) != 0) {
        *told = (event){.of = set->of, .type = 8, .data = xid};
        return SUCCESS;
    }
    int error = field_text(set->of, "wait", "", words);
    return error ? error : TIMEOUT;
}
