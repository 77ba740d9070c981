package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestParseFlags(t *testing.T) {
	for _, tt := range []struct {
		args string
		want config // expr is compared by whether there is one
		expr bool
	}{
		{"", config{}, false},
		{"-i eth0", config{interfaces: []string{"eth0"}}, false},
		{"--interface eth0 --interface=a,b -ic", config{interfaces: []string{"eth0", "a,b", "c"}}, false},
		{"--container web", config{container: "web"}, false},
		{"--netns c1 --netns /run/x --netns pid:7", config{netns: []string{"c1", "/run/x", "pid:7"}}, false},
		{"-c 13", config{count: 13}, false},
		{"--count=18446744073709551615", config{count: 1<<64 - 1}, false},
		{"-c 3 -c 5", config{count: 5}, false},
		{"--duration 1m30s", config{duration: 90 * time.Second}, false},
		{"--duration 2562047h", config{duration: 2562047 * time.Hour}, false},
		{"--format trace", config{format: "trace"}, false},
		{"--format json", config{format: "json"}, false},
		{"-o /tmp/x", config{output: "/tmp/x"}, false},
		{"--output -", config{output: "-"}, false},
		{"--ready-file /tmp/r", config{readyFile: "/tmp/r"}, false},
		{"-v", config{verbose: true}, false},
		{"-q", config{quiet: true}, false},
		{"icmp", config{}, true},
		{"tcp port 80 -c 2 and host 1.2.3.4", config{count: 2}, true},
		{"-q icmp -- ping -c 1 -q 1.2.3.4", config{quiet: true, command: []string{"ping", "-c", "1", "-q", "1.2.3.4"}}, true},
		{"-- nftrace -- x", config{command: []string{"nftrace", "--", "x"}}, false},
	} {
		t.Run(tt.args, func(t *testing.T) {
			var out bytes.Buffer
			got, err := parseFlags(strings.Fields(tt.args), &out)
			if err != nil {
				t.Fatal(err)
			}
			if (got.expr != nil) != tt.expr {
				t.Errorf("a filter: %v, want %v", got.expr != nil, tt.expr)
			}
			got.expr = nil
			if tt.want.format == "" {
				tt.want.format = "tree"
			}
			for _, c := range []*config{got, &tt.want} { // no list is as good as an empty one
				if len(c.interfaces) == 0 {
					c.interfaces = nil
				}
				if len(c.netns) == 0 {
					c.netns = nil
				}
			}
			if !reflect.DeepEqual(*got, tt.want) {
				t.Errorf("got  %+v\nwant %+v", *got, tt.want)
			}
			if out.Len() > 0 {
				t.Errorf("printed %q", out.String())
			}
		})
	}
}

// The usage text names every flag, and no other; its first flag column fits a terminal.
func TestUsageNamesAllFlags(t *testing.T) {
	for _, f := range []string{"-i", "--interface", "--container", "--netns", "-c", "--count", "--duration", "--format", "-o",
		"--output", "--ready-file", "-v", "--verbose", "-q", "--quiet", "--version", "-h", "--help"} {
		if !regexp.MustCompile(`(?m)^ +(-\w, )?` + f + `\b`).MatchString(usage) {
			t.Errorf("%s is missing", f)
		}
	}
	for _, f := range regexp.MustCompile(`(?m)^ +(?:-\w, )?(--[a-z-]+)(?: [A-Z]\S*)?$|^ +(?:-\w, )?(--[a-z-]+) .*  `).FindAllStringSubmatch(usage, -1) {
		args := []string{f[1] + f[2], "5s"}
		if _, err := parseFlags(args, io.Discard); err != nil && strings.Contains(err.Error(), "unknown flag") {
			t.Errorf("usage has %s: %v", args[0], err)
		}
	}
	for l := range strings.Lines(usage) {
		if n := len([]rune(strings.TrimRight(l, "\n"))); n > 92 {
			t.Errorf("%d columns: %s", n, l)
		}
	}
}

// What fails before the kernel is touched: one line, which says what is wrong, and 2.
func TestUsageErrors(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--nosuch"}, "unknown flag: --nosuch"},
		{[]string{"-x"}, "unknown shorthand flag: 'x' in -x"},
		{[]string{"--format", "xml"}, `--format "xml": want tree, trace or json`},
		{[]string{"--format="}, "--format is empty"},
		{[]string{"-c", "0"}, `--count "0": want a number of packets, at least 1`},
		{[]string{"-c", "-1"}, `--count "-1": want a number of packets, at least 1`},
		{[]string{"-c", "many"}, `--count "many": want a number of packets, at least 1`},
		{[]string{"-c", "18446744073709551616"}, `want a number of packets`},
		{[]string{"-c"}, "--count needs a value"},
		{[]string{"--container"}, "--container needs a value"},
		{[]string{"--duration", "0s"}, `--duration "0s": want a time with its unit, such as 10s or 5m`},
		{[]string{"--duration", "-1s"}, `--duration "-1s": want a time`},
		{[]string{"--duration", "1d"}, `--duration "1d": want a time with its unit, such as 10s or 5m; the largest unit is h`},
		{[]string{"--duration", "2562048h"}, "the longest time 2562047h"},
		{[]string{"--duration", "5"}, `--duration "5": want a time with its unit`},
		{[]string{"--quiet=perhaps"}, `--quiet "perhaps": `},
		{[]string{"-i", ""}, "--interface is empty"},
		{[]string{"-i", "eth0", "-i", ""}, "--interface is empty"},
		{[]string{"--container", ""}, "--container is empty"},
		{[]string{"--container="}, "--container is empty"},
		{[]string{"--netns", ""}, "--netns is empty"},
		{[]string{"-o", ""}, "--output is empty"},
		{[]string{"--ready-file", ""}, "--ready-file is empty"},
		{[]string{""}, "the filter is empty"},
		{[]string{"-c", "1", " ", "", "--", "true"}, "the filter is empty"},
		{[]string{"--"}, "no command behind --"},
		{[]string{"icmp", "--"}, "no command behind --"},
		{[]string{"icmp", "and"}, "filter: "},
		{[]string{"nosuch"}, `filter: unknown word "nosuch"`},
		{[]string{"lo"}, `filter: "lo" is an interface: packets that use it are asked for with -i lo (`},
		{[]string{"icmp", "and", "!(lo)"}, `"lo" is an interface`},
		{[]string{"host", "lo"}, `"lo" is an interface`},
		{[]string{"--netns", "pid:x"}, `--netns "pid:x": pid:N wants a process number`},
		{[]string{"--netns", "pid:0"}, `--netns "pid:0": pid:N wants a process number`},
		{[]string{"--netns", "c1", "--netns", "net:[x]"}, `--netns "net:[x]": net:[N] wants an inode number`},
		{[]string{"tcp", "port", "70000"}, "filter: "},
		{[]string{"(tcp"}, "filter: "},
		{[]string{"host", "\x1b[31m"}, "filter: "},
		{[]string{"-c", "\x1b[31m\n"}, "--count"},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if status := run(t.Context(), t.Context(), tt.args, strings.NewReader(""), &stdout, &stderr); status != 2 {
				t.Errorf("status %d, want 2", status)
			}
			checkMessage(t, stderr.String(), tt.want)
			if !strings.Contains(stderr.String(), "nftrace --help") {
				t.Errorf("no hint at --help: %s", stderr.String())
			}
			if stdout.Len() > 0 {
				t.Errorf("on stdout: %q", stdout.String())
			}
		})
	}
}

// checkMessage: one line for a terminal that holds want.
func checkMessage(t *testing.T, got, want string) {
	t.Helper()
	line, rest, ok := strings.Cut(got, "\n")
	if !ok || rest != "" || !strings.HasPrefix(line, "nftrace: ") {
		t.Errorf("not one line of nftrace: %q", got)
	}
	if line != oneLine(line) {
		t.Errorf("not for a terminal: %q", line)
	}
	if !strings.Contains(line, want) {
		t.Errorf("got  %s\nwant %s", line, want)
	}
	for _, bad := range []string{"strconv.", "%!", "invalid argument", "exit status"} {
		if strings.Contains(line, bad) {
			t.Errorf("%q is not for people: %s", bad, line)
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	for arg, want := range map[string]string{
		"--help": usage, "-h": usage, "--version": "nftrace " + versionString() + "\n",
	} {
		var stdout, stderr bytes.Buffer
		if status := run(t.Context(), t.Context(), []string{arg}, strings.NewReader(""), &stdout, &stderr); status != 0 {
			t.Errorf("%s: status %d", arg, status)
		}
		if stdout.String() != want || stderr.Len() > 0 {
			t.Errorf("%s: %q, %q", arg, stdout.String(), stderr.String())
		}
		stderr.Reset()
		if status := run(t.Context(), t.Context(), []string{arg}, nil, failingWriter{}, &stderr); status != 1 {
			t.Errorf("%s > /dev/full: status %d", arg, status)
		}
		checkMessage(t, stderr.String(), "no space")
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, unix.ENOSPC }

// What is checked before the probes are loaded fails fast and leaves no file. These
// need a kernel that nftrace runs on, and root.
func TestFailsBeforeProbes(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root")
	}
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err != nil {
		t.Skip("the kernel has no BTF; testenv/e2e tries the same in a VM")
	}
	if data, _ := os.ReadFile("/sys/kernel/security/lockdown"); bytes.Contains(data, []byte("[confidentiality]")) {
		t.Skip("the kernel is locked down")
	}
	tmp := t.TempDir()
	t.Setenv("DOCKER_HOST", "unix://"+filepath.Join(tmp, "none.sock"))
	out := filepath.Join(tmp, "out")
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"-i", "nosuch0"}, `interface "nosuch0" does not exist in this network namespace; ip link lists`},
		{[]string{"-i", "x\x1b[31m"}, `interface "x\x1b[31m" does not exist`},
		{[]string{"--netns", "nosuch"}, "--netns nosuch: no such network namespace"},
		{[]string{"--netns", "pid:2147483000"}, "no process 2147483000"},
		{[]string{"--netns", "/etc/passwd"}, "is not a network namespace"},
		{[]string{"-o", tmp + "/nosuch/out"}, "the directory " + tmp + "/nosuch does not exist"},
		{[]string{"-o", tmp}, "is a directory: name a file in it"},
		{[]string{"--ready-file", tmp + "/nosuch/r"}, "--ready-file " + tmp + "/nosuch/r: the directory"},
		{[]string{"-o", out, "--", "nosuch-command"}, `command "nosuch-command" is not in PATH`},
		{[]string{"-o", out, "--", "/etc/passwd"}, `command "/etc/passwd" cannot be run: permission denied`},
		{[]string{"-o", out, "--", tmp + "/nosuch"}, `command "` + tmp + `/nosuch" cannot be run: no such file`},
	} {
		t.Run(strings.Join(tt.args, " "), func(t *testing.T) {
			var stdout, stderr bytes.Buffer
			if status := run(t.Context(), t.Context(), tt.args, strings.NewReader(""), &stdout, &stderr); status != 1 {
				t.Errorf("status %d, want 1", status)
			}
			checkMessage(t, stderr.String(), tt.want)
			if stdout.Len() > 0 {
				t.Errorf("on stdout: %q", stdout.String())
			}
			if _, err := os.Stat(out); err == nil {
				t.Error("the output file is there")
				os.Remove(out)
			}
		})
	}
}

func TestNotRoot(t *testing.T) {
	if os.Geteuid() == 0 {
		t.Skip("testenv/e2e tries it as nobody")
	}
	var stdout, stderr bytes.Buffer
	if status := run(t.Context(), t.Context(), []string{"icmp"}, nil, &stdout, &stderr); status != 1 {
		t.Errorf("status %d", status)
	}
	checkMessage(t, stderr.String(), "sudo nftrace")
}

func TestErrorsAreUsage(t *testing.T) {
	_, err := parseFlags([]string{"-c", "0"}, io.Discard)
	var ue usageError
	if !errors.As(err, &ue) {
		t.Errorf("%T", err)
	}
}
