package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/spf13/pflag"

	"github.com/nftrace/nftrace/pkg/filter"
	"github.com/nftrace/nftrace/pkg/symbolize"
	"github.com/nftrace/nftrace/pkg/trace"
)

const usage = `Usage: nftrace [flags] [filter] [-- command args…]

Show the path of packets through netfilter: every hook, table, chain and rule that a
packet met, in the kernel's order, and what became of it: of iptables-legacy,
iptables-nft, nf_tables, ebtables and arptables. No rule is inserted, nothing is
logged, nothing on the system changes. Needs root.

Which packets:
  filter                    an expression in pcap-filter syntax, such as
                            "icmp", "tcp port 80 and host 172.17.0.2"
  -i, --interface NAME      packets that use this interface, as device or as bridge
                            port (repeatable)
      --container NAME|ID   packets of this Docker or Podman container
      --netns NAME|PATH|pid:N
                            packets in this network namespace (repeatable); with -i,
                            where the interfaces are looked up

When to stop (else with Ctrl-C):
  -c, --count N             after N packets
      --duration D          after a time such as 10s or 5m
  -- command args…          when this command, started once nftrace is attached, has
                            ended and what it caused is over; its output goes to stderr

Output:
      --format FORMAT       tree (for people), trace (the lines that the kernel's
                            TRACE target logs), json (an object per packet and line)
  -o, --output FILE         write there instead of to standard output
      --ready-file PATH     create this file once attached
      --backend BACKEND     how to probe the kernel: fentry, or kprobe, which older kernels
                            have, too; auto (the default) is fentry where there is that,
                            and else kprobe, for a module or for all
  -v, --verbose             say more on stderr
  -q, --quiet               say nothing but errors on stderr
      --version             print the version and exit
  -h, --help                print this and exit

Exit status: 0 done, 1 could not run, 2 wrong usage.

Examples:
  nftrace icmp
  nftrace --container web tcp port 80
  nftrace -i eth0 -c 10 --format trace udp port 53
  nftrace icmp -- ping -c 1 192.0.2.1
`

// config is what the command line says.
type config struct {
	interfaces []string
	container  string
	netns      []string
	count      uint64
	duration   time.Duration
	format     string
	output     string
	readyFile  string
	backend    trace.Backend // "": auto
	verbose    bool
	quiet      bool
	expr       *filter.Expr // nil: every packet
	command    []string
}

// usageError is a mistake on the command line: exit status 2.
type usageError struct{ error }

// errDone is returned where the answer was printed already (--help, --version).
var errDone = errors.New("done")

func parseFlags(args []string, stdout io.Writer) (*config, error) {
	var c config
	fs := pflag.NewFlagSet("nftrace", pflag.ContinueOnError)
	fs.SetOutput(io.Discard)
	fs.Usage = func() {}
	fs.StringArrayVarP(&c.interfaces, "interface", "i", nil, "")
	fs.StringVar(&c.container, "container", "", "")
	fs.StringArrayVar(&c.netns, "netns", nil, "")
	fs.VarP((*countValue)(&c.count), "count", "c", "")
	fs.Var((*durationValue)(&c.duration), "duration", "")
	fs.StringVar(&c.format, "format", "tree", "")
	fs.StringVarP(&c.output, "output", "o", "", "")
	fs.StringVar(&c.readyFile, "ready-file", "", "")
	backend := fs.String("backend", "auto", "")
	fs.BoolVarP(&c.verbose, "verbose", "v", false, "")
	fs.BoolVarP(&c.quiet, "quiet", "q", false, "")
	version := fs.Bool("version", false, "")
	help := fs.BoolP("help", "h", false, "")

	if err := fs.Parse(args); err != nil {
		return nil, usageError{flagError(err)}
	}
	if *help || *version {
		text := usage
		if *version {
			text = fmt.Sprintf("nftrace %s\n", versionString())
		}
		if _, err := io.WriteString(stdout, text); err != nil {
			return nil, err
		}
		return nil, errDone
	}

	words := fs.Args()
	if dash := fs.ArgsLenAtDash(); dash >= 0 {
		words, c.command = words[:dash], words[dash:]
		if len(c.command) == 0 {
			return nil, usageError{errors.New("no command behind --")}
		}
	}
	// An empty value is mostly a shell variable that is not set. It must not mean
	// everything.
	var empty error
	fs.Visit(func(f *pflag.Flag) {
		v := f.Value.String()
		if list, ok := f.Value.(pflag.SliceValue); ok {
			for _, e := range list.GetSlice() {
				if e == "" {
					v = ""
				}
			}
		}
		if v == "" && empty == nil {
			empty = fmt.Errorf("--%s is empty: give it a value or leave it out", f.Name)
		}
	})
	if empty != nil {
		return nil, usageError{empty}
	}
	switch c.format {
	case "tree", "trace", "json":
	default:
		return nil, usageError{fmt.Errorf("--format %q: want tree, trace or json", c.format)}
	}
	switch b := trace.Backend(*backend); b {
	case "auto":
	case trace.Fentry, trace.Kprobe:
		c.backend = b
	default:
		return nil, usageError{fmt.Errorf("--backend %q: want auto, fentry or kprobe", b)}
	}
	if len(words) > 0 {
		expr := strings.Join(words, " ")
		if strings.TrimSpace(expr) == "" {
			return nil, usageError{errors.New("the filter is empty: give one or leave it out")}
		}
		var err error
		if c.expr, err = filter.Parse(expr); err != nil {
			if name := interfaceIn(expr); name != "" {
				err = fmt.Errorf("filter: %q is an interface: packets that use it are asked for with -i %s", name, name)
			}
			return nil, usageError{err}
		}
	}
	for _, spec := range c.netns {
		if err := symbolize.CheckNetns(spec); err != nil {
			return nil, usageError{fmt.Errorf("--netns %w", err)}
		}
	}
	return &c, nil
}

// interfaceIn returns the first word of a filter that is the name of an interface here, "" if there is none.
func interfaceIn(expr string) string {
	all, _ := net.Interfaces() // without them there is no hint
	for _, word := range strings.FieldsFunc(expr, func(r rune) bool { return unicode.IsSpace(r) || strings.ContainsRune("()!&|", r) }) {
		if slices.ContainsFunc(all, func(i net.Interface) bool { return i.Name == word }) {
			return word
		}
	}
	return ""
}

// countValue is a number of packets.
type countValue uint64

func (v *countValue) String() string { return strconv.FormatUint(uint64(*v), 10) }
func (v *countValue) Type() string   { return "number" }

func (v *countValue) Set(s string) error {
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil || n == 0 {
		return errors.New("want a number of packets, at least 1")
	}
	*v = countValue(n)
	return nil
}

// durationValue is a time that is not over at once.
type durationValue time.Duration

func (v *durationValue) String() string { return time.Duration(*v).String() }
func (v *durationValue) Type() string   { return "duration" }

func (v *durationValue) Set(s string) error {
	d, err := time.ParseDuration(s)
	if err != nil || d <= 0 {
		return errors.New("want a time with its unit, such as 10s or 5m; the largest unit is h, the longest time 2562047h")
	}
	*v = durationValue(d)
	return nil
}

// flagError says what pflag says, shorter.
func flagError(err error) error {
	var invalid *pflag.InvalidValueError
	var missing *pflag.ValueRequiredError
	switch {
	case errors.As(err, &invalid):
		if errors.Is(err, strconv.ErrSyntax) {
			return fmt.Errorf("--%s %q: it takes no value but true or false", invalid.GetFlag().Name, invalid.GetValue())
		}
		return fmt.Errorf("--%s %q: %w", invalid.GetFlag().Name, invalid.GetValue(), errors.Unwrap(invalid))
	case errors.As(err, &missing):
		return fmt.Errorf("--%s needs a value", missing.GetFlag().Name)
	}
	return err
}

// version is set by the linker for releases.
var version = ""

func versionString() string {
	if version != "" {
		return version
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "(unknown)"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && v == "(devel)" {
			v += " " + s.Value[:min(12, len(s.Value))]
		}
	}
	return v
}
