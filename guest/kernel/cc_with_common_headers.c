// SPDX-License-Identifier: GPL-2.0-only
//
// The compiler as the kernel's makefiles call it, with the headers that nearly every file includes parsed once.
// Two thirds of a kernel build is parsing them 1,600 times; build.sh compiles this and passes it as CC to stay within its time.
//
// KOMBI_COMMON (a directory) holds common.h, its precompiled form common.h.gch, names.h, and flags: the flags it was compiled
// with, on two lines, those that only say where to search and what to define on the second. A file is compiled with it only when
// that cannot change the result: its flags are the same but for further -I and -D at the end (gcc itself refuses precompiled
// headers that know the name of such a macro, and then reads common.h as text), and it defines nothing but message prefixes before
// its first #include. Everything else, and whatever then fails, goes to gcc as it came.
//
// KOMBI_COMMON_FLAGS_TO=FILE writes those two lines for the file at hand.

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

static bool starts(const char *text, const char *with)
{
    return strncmp(text, with, strlen(with)) == 0;
}

static void *or_die(void *memory)
{
    if (!memory) {
        perror("cc_with_common_headers");
        exit(1);
    }
    return memory;
}

static char *join(const char *a, const char *b)
{
    char *joined = or_die(malloc(strlen(a) + strlen(b) + 1));
    return strcat(strcpy(joined, a), b);
}

// Words, each behind a blank.
struct words {
    char *text;
    size_t length;
};

static void add(struct words *words, const char *word)
{
    size_t more = strlen(word) + 1;
    words->text = or_die(realloc(words->text, words->length + more + 1));
    words->text[words->length] = ' ';
    strcpy(words->text + words->length + 1, word);
    words->length += more;
}

static void as_it_came(char **argv)
{
    argv[0] = "gcc";
    execvp("gcc", argv);
    perror("gcc");
    exit(127);
}

// Whether FILE defines nothing but message prefixes before its first #include.
static bool begins_with_includes(const char *file)
{
    char line[4096];
    bool plain = true;
    FILE *source = fopen(file, "r");
    if (!source)
        return false;
    while (fgets(line, sizeof line, source) && !starts(line, "#include")) {
        if (line[0] == '#' && !starts(line, "#define pr_fmt") && !starts(line, "#define dev_fmt") &&
            !starts(line, "# define pr_fmt")) {
            plain = false;
            break;
        }
    }
    fclose(source);
    return plain;
}

// Whether the flags are those of the precompiled headers.
static bool common_flags(const char *path, const char *flags, const char *searched)
{
    char line[2][16384] = {"", ""};
    FILE *file = fopen(path, "r");
    if (!file)
        return false;
    for (int i = 0; i < 2; i++) {
        if (!fgets(line[i], sizeof line[i], file))
            break;
        line[i][strcspn(line[i], "\n")] = 0;
    }
    fclose(file);
    return line[0][0] && strcmp(flags, line[0]) == 0 && starts(searched, line[1]);
}

int main(int argc, char **argv)
{
    const char *common = getenv("KOMBI_COMMON"), *flags_to = getenv("KOMBI_COMMON_FLAGS_TO");
    const char *source = argv[argc - 1], *object = NULL, *dependencies = NULL;
    char *precompiled = common ? join(common, "/common.h.gch") : NULL;
    size_t length = strlen(source);
    struct words flags = {0}, searched = {0};
    bool kernel_proper = false, compiles = false;
    int n = 0;

    if (!common || access(precompiled, F_OK) != 0 || length < 3 || strcmp(source + length - 2, ".c") != 0)
        as_it_came(argv);

    char **ours = or_die(calloc(argc + 8, sizeof *ours));
    ours[n++] = "gcc";
    ours[n++] = "-w";
    ours[n++] = "-include";
    ours[n++] = join(common, "/common.h");
    ours[n++] = "-include";
    ours[n++] = join(common, "/names.h");
    add(&flags, "");
    add(&searched, "");
    for (int i = 1; i < argc; i++) {
        char *word = argv[i];
        if (strcmp(word, "-include") == 0) {
            i++; // common.h includes these first
        } else if (strcmp(word, "-o") == 0 && i + 1 < argc) {
            object = argv[i + 1];
            ours[n++] = word;
            ours[n++] = argv[++i];
        } else if (strcmp(word, "-I") == 0 && i + 1 < argc) {
            add(&searched, word);
            add(&searched, argv[i + 1]);
            ours[n++] = word;
            ours[n++] = argv[++i];
        } else if (starts(word, "-Wp,-MMD,")) {
            dependencies = word + strlen("-Wp,-MMD,");
        } else if (starts(word, "-D__KBUILD_MODNAME=")) {
            ours[n++] = join("-DKOMBI_MODNAME_TOKEN=", strchr(word, '=') + 1);
        } else if (starts(word, "-DKBUILD_")) {
            kernel_proper |= starts(word, "-DKBUILD_MODNAME=");
            ours[n++] = join("-DKOMBI_", word + strlen("-DKBUILD_"));
        } else if (starts(word, "-I") || starts(word, "-D")) {
            add(&searched, word);
            ours[n++] = word;
        } else if (starts(word, "-W")) {
            // Warnings are the kernel developers' business.
        } else if (strcmp(word, "-c") == 0 || i == argc - 1) {
            compiles |= i != argc - 1;
            ours[n++] = word;
        } else {
            add(&flags, word);
            ours[n++] = word;
        }
    }
    if (!kernel_proper || !compiles || !object)
        as_it_came(argv);

    if (flags_to) {
        FILE *file = or_die(fopen(flags_to, "w"));
        fprintf(file, "%s\n%s\n", flags.text, searched.text);
        fclose(file);
    }
    if (!common_flags(join(common, "/flags"), flags.text, searched.text) || !begins_with_includes(source))
        as_it_came(argv);

    pid_t child = fork();
    if (child == 0) {
        // What it complains of, gcc says again when asked as the makefile does.
        dup2(open("/dev/null", O_WRONLY), STDERR_FILENO);
        execvp("gcc", ours);
        _exit(127);
    }
    int status;
    if (child < 0 || waitpid(child, &status, 0) != child || status != 0)
        as_it_came(argv);
    if (dependencies) {
        FILE *file = or_die(fopen(dependencies, "w"));
        fprintf(file, "%s: %s\n", object, source);
        fclose(file);
    }
    return 0;
}
