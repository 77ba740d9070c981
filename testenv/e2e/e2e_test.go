package e2e

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/tools/txtar"

	"github.com/nftrace/nftrace/testenv/oracle"
	"github.com/nftrace/nftrace/testenv/topo"
)

// prelude is what the shell lines of a case may use.
const prelude = `
on() { ip netns exec "$@"; }
serve() {
	_ns=$1; shift; _prog=$1; shift; _sub=$1; shift
	rm -f $TMP/ready; mkfifo $TMP/ready
	ip netns exec "$_ns" "$_prog" "$_sub" -ready $TMP/ready "$@" &
	_servers="$_servers $!"
	read _line < $TMP/ready
}
_servers=
`

// epilogue waits for every server, and fails if one did.
const epilogue = `
for _pid in $_servers; do wait $_pid; done
`

// a testCase is one txtar file, parsed.
type testCase struct {
	about    string
	topology string
	rules    []ruleset
	setup    string
	run      string
	args     []string
	oracle   []string
	trace    []path
	output   []string
	notOn    map[string]string // why, by kernel
}

type ruleset struct{ ns, program, text string }

// a path is what some packets are expected to do.
type path struct {
	line  int
	count int // 0: one or more
	match []string
	rules []string
}

func parseCase(data []byte) (*testCase, error) {
	ar := txtar.Parse(data)
	c := &testCase{about: strings.TrimSpace(string(ar.Comment)), oracle: []string{"h"}, notOn: map[string]string{}}
	seen := map[string]bool{}
	for _, f := range ar.Files {
		text := string(f.Data)
		if seen[f.Name] {
			return nil, fmt.Errorf("section %q is there twice", f.Name)
		}
		seen[f.Name] = true
		fields := strings.Fields(f.Name)
		kernel, not := strings.CutPrefix(f.Name, "not on ")
		switch {
		case not:
			if c.notOn[kernel] = strings.TrimSpace(text); c.notOn[kernel] == "" {
				return nil, fmt.Errorf("not on %s, and no reason", kernel)
			}
		case f.Name == "topology":
			c.topology = strings.TrimSpace(text)
		case len(fields) == 3 && fields[0] == "rules":
			c.rules = append(c.rules, ruleset{fields[1], fields[2], text})
		case f.Name == "setup":
			c.setup = text
		case f.Name == "run":
			c.run = text
		case f.Name == "args":
			c.args = strings.Fields(text)
		case f.Name == "oracle":
			c.oracle = strings.Fields(text)
		case f.Name == "trace":
			var err error
			if c.trace, err = parsePaths(text); err != nil {
				return nil, err
			}
		case f.Name == "output":
			for line := range strings.Lines(text) {
				if line = strings.TrimSpace(line); line != "" {
					c.output = append(c.output, line)
				}
			}
		default:
			return nil, fmt.Errorf("no such section: %q", f.Name)
		}
	}
	if !slices.Contains(topo.Names(), c.topology) {
		return nil, fmt.Errorf("topology %q: there are %s", c.topology, strings.Join(topo.Names(), ", "))
	}
	if c.run == "" {
		return nil, fmt.Errorf("no section run: without traffic there is nothing to see")
	}
	if len(c.trace) > 0 && len(c.oracle) == 0 {
		return nil, fmt.Errorf("section trace needs the oracle")
	}
	return c, nil
}

func parsePaths(text string) ([]path, error) {
	var paths []path
	n := 0
	for line := range strings.Lines(text) {
		n++
		fields := strings.FieldsFunc(line, func(r rune) bool { return r == ' ' || r == '\t' || r == '\n' || r == ',' })
		if len(fields) == 0 || strings.HasPrefix(fields[0], "#") {
			continue
		}
		if line[0] == ' ' || line[0] == '\t' {
			if len(paths) == 0 {
				return nil, fmt.Errorf("trace, line %d: rules before the line that says of which packets", n)
			}
			for _, f := range fields {
				if strings.Count(f, ":") < 3 {
					return nil, fmt.Errorf("trace, line %d: %q is not table:chain:type:number", n, f)
				}
			}
			p := &paths[len(paths)-1]
			p.rules = append(p.rules, fields...)
			continue
		}
		p := path{line: n, match: fields[1:]}
		if fields[0] != "+" {
			if _, err := fmt.Sscanf(fields[0], "%d", &p.count); err != nil || p.count < 1 {
				return nil, fmt.Errorf("trace, line %d: want a number of packets or +, got %q", n, fields[0])
			}
		}
		paths = append(paths, p)
	}
	for _, p := range paths {
		if len(p.rules) == 0 {
			return nil, fmt.Errorf("trace, line %d: no rules follow", p.line)
		}
	}
	return paths, nil
}

// checkPaths holds the packets that the kernel saw against what is expected.
func checkPaths(want []path, packets []oracle.Packet) error {
	var report []string
	claimed := make([]bool, len(packets))
	for _, p := range want {
		n := 0
		for i, pkt := range packets {
			fields := strings.Fields(pkt.First)
			if claimed[i] || p.count > 0 && n == p.count ||
				slices.ContainsFunc(p.match, func(m string) bool { return !slices.Contains(fields, m) }) {
				continue
			}
			claimed[i] = true
			n++
			if !slices.Equal(p.rules, pkt.Rules) {
				report = append(report, fmt.Sprintf("line %d: another path\n  packet %s\n  want   %s\n  got    %s",
					p.line, pkt.First, strings.Join(p.rules, " "), strings.Join(pkt.Rules, " ")))
			}
		}
		if n < max(p.count, 1) {
			report = append(report, fmt.Sprintf("line %d: %d packets with %s, want %s", p.line, n, strings.Join(p.match, " "),
				map[bool]string{true: "one or more", false: fmt.Sprint(p.count)}[p.count == 0]))
		}
	}
	for i, pkt := range packets {
		if !claimed[i] {
			report = append(report, fmt.Sprintf("not expected:\n  packet %s\n  got    %s", pkt.First, strings.Join(pkt.Rules, " ")))
		}
	}
	if len(report) > 0 {
		return fmt.Errorf("%s", strings.Join(report, "\n"))
	}
	return nil
}

func TestCases(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Fatal("no cases in testdata")
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txtar"), func(t *testing.T) {
			data, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			c, err := parseCase(data)
			if err != nil {
				t.Fatal(err)
			}
			if os.Getenv("NFTRACE_IN_VM") != "1" {
				t.Skip("needs a VM: make test-e2e")
			}
			for kernel, why := range c.notOn {
				if strings.HasPrefix(read(t, "/proc/sys/kernel/osrelease"), kernel+".") {
					t.Skipf("not on Linux %s: %s", kernel, why)
				}
			}
			runCase(t, c)
		})
	}
}

// hasEbtables tells whether the kernel has the legacy tables of ebtables: Debian's have, up to
// 6.12.
func hasEbtables() bool {
	var u unix.Utsname
	return unix.Uname(&u) == nil && slices.ContainsFunc([]string{"5.10.", "6.1.", "6.12."},
		func(v string) bool { return strings.HasPrefix(unix.ByteSliceToString(u.Release[:]), v) })
}

func runCase(t *testing.T, c *testCase) {
	if strings.Contains(c.topology, "ebtables") && !hasEbtables() {
		t.Skip("this kernel has no ebtables but by way of nf_tables")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	// t.Context ends before cleanups run.
	after := context.WithoutCancel(ctx)

	top, err := topo.Up(ctx, c.topology)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := top.Down(after); err != nil {
			t.Error(err)
		}
	})
	for _, r := range c.rules {
		load := topo.Load
		if r.program == "sh" {
			load = func(ctx context.Context, ns, _, text string) error { return topo.Shell(ctx, ns, text) }
		}
		if err := load(ctx, r.ns, r.program, r.text); err != nil {
			t.Fatal(err)
		}
	}
	tmp := t.TempDir()
	if c.setup != "" {
		shell(ctx, t, tmp, "setup", nil, c.setup)
	}

	var o *oracle.Oracle
	if len(c.oracle) > 0 {
		if o, err = oracle.Start(ctx, c.oracle...); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := o.Close(after); err != nil {
				t.Error(err)
			}
		})
	}

	format := formatOf(c.args)
	out := filepath.Join(tmp, "out")
	var tool []string
	if nftrace, err := exec.LookPath("nftrace"); err == nil {
		tool = []string{nftrace, "-o", out}
		if format == "" {
			format = "trace"
			tool = append(tool, "--format", "trace")
		}
		tool = append(append(tool, c.args...), "--")
	} else {
		t.Log("no nftrace in PATH: only the kernel's own trace is checked")
	}
	shell(ctx, t, tmp, "run", tool, c.run)

	var lines []string
	if o != nil {
		if lines, err = o.Lines(); err != nil {
			t.Fatal(err)
		}
		if len(lines) == 0 {
			t.Error("the kernel traced nothing")
		}
		packets, err := oracle.Packets(lines)
		if err != nil {
			t.Fatal(err)
		}
		if c.trace != nil {
			if err := checkPaths(c.trace, packets); err != nil {
				t.Errorf("the kernel's trace is not the expected one:\n%v", err)
			}
		}
		t.Logf("%d packets, %d lines", len(packets), len(lines))
	}
	if tool == nil {
		return
	}
	data, err := os.ReadFile(out)
	if err != nil {
		t.Fatalf("nftrace: %v", err)
	}
	if format == "trace" && o != nil {
		tool := strings.Split(strings.TrimSpace(oracle.Without(string(data))), "\n")
		if err := oracle.Compare(lines, tool); err != nil {
			t.Error(err)
		}
	}
	rest := string(data)
	for _, want := range c.output {
		_, after, ok := strings.Cut(rest, want)
		if !ok {
			t.Errorf("nftrace does not print, or not in this order: %s\nit printed:\n%s", want, data)
			break
		}
		rest = after
	}
}

// formatOf gives what args say about --format.
func formatOf(args []string) string {
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, "--format="); ok {
			return v
		}
		if a == "--format" && i+1 < len(args) {
			return args[i+1]
		}
	}
	return ""
}

// shell runs lines, below a tool if there is one.
func shell(ctx context.Context, t *testing.T, tmp, name string, tool []string, lines string) {
	t.Helper()
	file := filepath.Join(tmp, name+".sh")
	if err := os.WriteFile(file, []byte("set -e\n"+prelude+lines+epilogue), 0o644); err != nil {
		t.Fatal(err)
	}
	args := append(slices.Clone(tool), "sh", file)
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	cmd.Env = append(os.Environ(), "TMP="+tmp)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.WaitDelay = 5 * time.Second
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out.Bytes())
	}
	if testing.Verbose() && out.Len() > 0 {
		t.Logf("%s:\n%s", name, out.Bytes())
	}
}

// A wrong expectation must fail, or the cases prove nothing.
func TestCheckPathsFindsPlantedErrors(t *testing.T) {
	packets := []oracle.Packet{
		{First: "TRACE: raw:PREROUTING:policy:1 SRC=1.1.1.1 TYPE=8", Rules: []string{"raw:PREROUTING:policy:1", "nat:PREROUTING:policy:2"}},
		{First: "TRACE: raw:PREROUTING:policy:1 SRC=1.1.1.1 TYPE=8", Rules: []string{"raw:PREROUTING:policy:1"}},
	}
	for _, tt := range []struct {
		trace string
		ok    bool
	}{
		{"1 TYPE=8\n raw:PREROUTING:policy:1, nat:PREROUTING:policy:2\n+ TYPE=8\n raw:PREROUTING:policy:1\n", true},
		{"1 TYPE=8\n\traw:PREROUTING:policy:1\n\tnat:PREROUTING:policy:2\n1 SRC=1.1.1.1\n raw:PREROUTING:policy:1\n", true},
		{"1 TYPE=8\n raw:PREROUTING:policy:1, nat:PREROUTING:policy:2\n", false},
		{"2 TYPE=8\n raw:PREROUTING:policy:1\n", false},
		{"1 TYPE=8\n raw:PREROUTING:policy:1, nat:PREROUTING:policy:3\n+ TYPE=8\n raw:PREROUTING:policy:1\n", false},
		{"1 TYPE=8\n raw:PREROUTING:policy:1, nat:PREROUTING:policy:2\n2 TYPE=8\n raw:PREROUTING:policy:1\n", false},
		{"1 TYPE=0\n raw:PREROUTING:policy:1\n", false},
	} {
		paths, err := parsePaths(tt.trace)
		if err != nil {
			t.Errorf("%q: %v", tt.trace, err)
			continue
		}
		if err := checkPaths(paths, packets); (err == nil) != tt.ok {
			t.Errorf("%q: %v, want ok %v", tt.trace, err, tt.ok)
		}
	}
}

// See testenv/vm.go: with cmpxchg16b the emulator makes up what an interrupt comes back to.
func TestNoCmpxchg16b(t *testing.T) {
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(cpu, []byte("TCG")) && slices.Contains(strings.Fields(string(cpu)), "cx16") {
		t.Error("the guest's kernel uses cmpxchg16b, whose emulation is broken")
	}
}
