package testenv

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sort"
	"strings"
)

// kernelSource says where a kernel comes from: the name it is asked for by, and
// the pattern of the Debian packages that hold it. The newest package that the
// package index knows is taken. The signed and the unsigned package hold the
// same kernel; an index may know only one of them.
type kernelSource struct {
	name    string
	pattern *regexp.Regexp
	// suites have the packages; none: those of the machine's own apt sources.
	suites []suite
	// arch is another architecture than amd64. Then suites have the guest's programs, too.
	arch string
	// config, if there is one, configures the source that is in the package: the kernel is built.
	config string
}

// kernelPackages is the table of kernels.
var kernelPackages = []kernelSource{
	{name: "6.12", pattern: regexp.MustCompile(`^linux-image-6\.12\.[0-9]+\+deb[0-9]+-cloud-amd64(-unsigned)?$`)},
	{name: "6.1", pattern: regexp.MustCompile(`^linux-image-6\.1\.0-[0-9]+-cloud-amd64(-unsigned)?$`)},
	{name: "6.18", pattern: regexp.MustCompile(`^linux-image-6\.18\.[0-9]+\+deb[0-9]+-cloud-amd64(-unsigned)?$`),
		suites: []suite{{name: "trixie-backports"}}},
	// The newest that was released; experimental has candidates for the next one.
	{name: "7.x", pattern: regexp.MustCompile(`^` + binaryPrefix + `(unsigned-)?7\.[0-9]+\.[0-9]+\+deb[0-9]+-cloud-amd64$`),
		suites: []suite{{name: "trixie-backports"}, {name: "sid"}}},
	{name: "5.10", pattern: regexp.MustCompile(`^linux-image-5\.10\.0-[0-9]+-cloud-amd64(-unsigned)?$`),
		suites: []suite{{name: "bullseye"}, {name: "bullseye-security", security: true, ended: true}}},
	{name: "6.12-builtin", pattern: regexp.MustCompile(`^linux-source-6\.12$`), config: builtinConfig},
	{name: "6.12-arm64", pattern: regexp.MustCompile(`^linux-image-6\.12\.[0-9]+\+deb[0-9]+-cloud-arm64(-unsigned)?$`),
		suites: []suite{{name: "bookworm"}, {name: "bookworm-security", security: true}}, arch: "arm64"},
}

// apt gets options to ask for the packages; cache is the cache's directory.
func (s *kernelSource) apt(ctx context.Context, cache string, log io.Writer) (apt, error) {
	if s.suites == nil {
		return nil, nil
	}
	return suitesApt(ctx, filepath.Join(cache, "apt", s.name), cmp.Or(s.arch, "amd64"), s.suites, log)
}

// binaryPrefix is how the packages are named that hold a kernel and nothing else.
const binaryPrefix = "linux-binary-"

// otherParts are the packages with the rest of the kernel in pkg: its modules, and the lists
// that come with them.
func otherParts(pkg string) []string {
	release, ok := strings.CutPrefix(pkg, binaryPrefix)
	if !ok {
		return nil
	}
	release = strings.TrimPrefix(release, "unsigned-")
	return []string{"linux-modules-" + release, "linux-base-" + release}
}

// KernelNames returns the names that Kernel knows.
func KernelNames() []string {
	var names []string
	for _, k := range kernelPackages {
		names = append(names, k.name)
	}
	return names
}

// sourceOf returns nil for a name that nobody knows.
func sourceOf(name string) *kernelSource {
	i := slices.IndexFunc(kernelPackages, func(k kernelSource) bool { return k.name == name })
	if i < 0 {
		return nil
	}
	return &kernelPackages[i]
}

// Kernel is an unpacked kernel package.
type Kernel struct {
	Name    string // as asked for: "6.12"
	Arch    string // "" is amd64; else the guest's programs are of packages, too
	Package string // linux-image-6.12.117+deb12-cloud-amd64
	Version string // the package's version
	Release string // what uname -r says in it
	Dir     string // the unpacked package
}

// Image is the path of the kernel image on the host.
func (k *Kernel) Image() string {
	// Packages without modules ship it as a file of the module directory.
	p := filepath.Join(k.Modules(), "vmlinuz")
	if _, err := os.Stat(p); err == nil {
		return p
	}
	return filepath.Join(k.Dir, "boot", "vmlinuz-"+k.Release)
}

// Modules is the path of the kernel's module directory on the host.
func (k *Kernel) Modules() string {
	// With merged /usr, new packages ship usr/lib/modules.
	for _, d := range []string{"lib/modules", "usr/lib/modules"} {
		p := filepath.Join(k.Dir, d, k.Release)
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	return filepath.Join(k.Dir, "lib/modules", k.Release)
}

// CacheDir returns the directory for kernels and initramfs archives:
// $NFTRACE_CACHE, or nftrace below $XDG_CACHE_HOME or ~/.cache.
func CacheDir() (string, error) {
	if d := os.Getenv("NFTRACE_CACHE"); d != "" {
		return filepath.Abs(d)
	}
	d, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("%w: set NFTRACE_CACHE to a directory for kernels", err)
	}
	return filepath.Join(d, "nftrace"), nil
}

// FindKernel returns the kernel of that name, fetching and unpacking its
// package, or building what is in it, if it is not in the cache. Where the archive has nothing or cannot be
// reached, a kernel cached before is used and log is told so; if there is none, root
// has the machine's package index brought up to date first.
func FindKernel(ctx context.Context, name string, log io.Writer) (*Kernel, error) {
	src := sourceOf(name)
	if src == nil {
		return nil, fmt.Errorf("no kernel %q: there are %s", name, strings.Join(KernelNames(), ", "))
	}
	cache, err := CacheDir()
	if err != nil {
		return nil, err
	}
	cache = filepath.Join(cache, "kernels")
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return nil, err
	}

	k, err := newestKernel(ctx, src, cache, log)
	if err == nil {
		return k, nil
	}
	if k := newestCached(ctx, src, cache); k != nil && ctx.Err() == nil {
		fmt.Fprintf(log, "vm: using the cached %s %s: %v\n", k.Package, k.Version, err)
		return k, nil
	}
	// A new machine's index may be old, incomplete or empty.
	if src.suites == nil && os.Geteuid() == 0 && ctx.Err() == nil {
		fmt.Fprintf(log, "vm: running apt-get update: %v\n", err)
		if _, err := output(ctx, "", "apt-get", "-q", "update"); err != nil {
			return nil, err
		}
		k, err = newestKernel(ctx, src, cache, log)
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	return k, err
}

// newestKernel returns the kernel in the newest package that the index has.
func newestKernel(ctx context.Context, src *kernelSource, cache string, log io.Writer) (*Kernel, error) {
	a, err := src.apt(ctx, filepath.Dir(cache), log)
	if err != nil {
		return nil, err
	}
	pkg, version, err := newestPackage(ctx, a, src.pattern)
	if err != nil {
		return nil, err
	}
	dir := filepath.Join(cache, pkg+"_"+version+src.build())
	if _, err := os.Stat(dir); err != nil {
		get, doing := fetchPackage, "fetching %s %s\n"
		if src.config != "" {
			get, doing = src.buildPackage, "fetching and building %s %s, which takes many minutes\n"
		}
		fmt.Fprintf(log, "vm: "+doing, pkg, version)
		if err := get(ctx, a, pkg, version, dir); err != nil {
			return nil, err
		}
	}
	return openKernel(src, pkg, version+src.build(), dir)
}

func openKernel(src *kernelSource, pkg, version, dir string) (*Kernel, error) {
	boot, err1 := filepath.Glob(filepath.Join(dir, "boot", "vmlinuz-*"))
	modules, err2 := filepath.Glob(filepath.Join(dir, "usr/lib/modules/*/vmlinuz"))
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	var releases []string
	for _, p := range boot {
		releases = append(releases, strings.TrimPrefix(filepath.Base(p), "vmlinuz-"))
	}
	for _, p := range modules {
		releases = append(releases, filepath.Base(filepath.Dir(p)))
	}
	if len(releases) != 1 {
		return nil, fmt.Errorf("%s: %d kernel images where one was expected; remove the directory and try again", dir, len(releases))
	}
	return &Kernel{Name: src.name, Arch: src.arch, Package: pkg, Version: version, Release: releases[0], Dir: dir}, nil
}

// newestPackage asks a package index.
func newestPackage(ctx context.Context, a apt, pattern *regexp.Regexp) (pkg, version string, err error) {
	prefix, _ := pattern.LiteralPrefix()
	if prefix == "" {
		prefix = "linux-image-"
	}
	out, err := a.run(ctx, "", "apt-cache", "pkgnames", prefix)
	if err != nil {
		return "", "", err
	}
	var names []string
	for _, n := range strings.Fields(out) {
		if pattern.MatchString(n) {
			names = append(names, n)
		}
	}
	if len(names) == 0 {
		return "", "", fmt.Errorf("no package matches %s: %s", pattern, a.cure())
	}
	sort.Strings(names)
	out, err = a.run(ctx, "", "apt-cache", append([]string{"show", "--no-all-versions"}, names...)...)
	if err != nil {
		return "", "", err
	}
	for para := range strings.SplitSeq(out, "\n\n") {
		p, v := field(para, "Package"), field(para, "Version")
		// A virtual or removed package has no paragraph of its own.
		if !pattern.MatchString(p) || v == "" || field(para, "Filename") == "" {
			continue
		}
		// At the same version the signed package is kept: it sorts first.
		if version == "" || newer(ctx, v, version) {
			pkg, version = p, v
		}
	}
	if pkg == "" {
		return "", "", fmt.Errorf("no package that matches %s can be downloaded: %s", pattern, a.cure())
	}
	return pkg, version, nil
}

// field returns a field of a paragraph in Debian's control format.
func field(para, name string) string {
	for line := range strings.SplitSeq(para, "\n") {
		if v, ok := strings.CutPrefix(line, name+":"); ok {
			return strings.TrimSpace(v)
		}
	}
	return ""
}

func newer(ctx context.Context, a, b string) bool {
	return exec.CommandContext(ctx, "dpkg", "--compare-versions", a, "gt", b).Run() == nil
}

// fetchPackage downloads a kernel's package, with those that have the rest of it, and unpacks
// them together as dir.
func fetchPackage(ctx context.Context, a apt, pkg, version, dir string) error {
	packages := []string{pkg + "=" + version}
	for _, p := range otherParts(pkg) {
		packages = append(packages, p+"="+version)
	}
	return a.unpack(ctx, packages, dir)
}

// unpack downloads packages (NAME=VERSION) and unpacks them together as dir, which appears
// complete or not at all.
func (a apt) unpack(ctx context.Context, packages []string, dir string) error {
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".fetch-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if _, err := a.run(ctx, tmp, "apt-get", append([]string{"-q", "download"}, packages...)...); err != nil {
		return fmt.Errorf("%w; if the package index is old, %s", err, a.cure())
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return err
	}
	if len(debs) != len(packages) {
		return fmt.Errorf("apt-get download %s left %d files where %d were expected", strings.Join(packages, " "), len(debs), len(packages))
	}
	tree := filepath.Join(tmp, "tree")
	for _, deb := range debs {
		if _, err := output(ctx, tmp, "dpkg", "-x", deb, tree); err != nil {
			return err
		}
	}
	if err := os.Chmod(tree, 0o755); err != nil {
		return err
	}
	err = os.Rename(tree, dir)
	if errors.Is(err, os.ErrExist) {
		return nil // another vm was faster
	}
	return err
}

func newestCached(ctx context.Context, src *kernelSource, cache string) *Kernel {
	entries, err := os.ReadDir(cache)
	if err != nil {
		return nil
	}
	var best *Kernel
	for _, e := range entries {
		pkg, version, ok := strings.Cut(e.Name(), "_")
		if !ok || !src.pattern.MatchString(pkg) || !strings.HasSuffix(version, src.build()) || best != nil && !newer(ctx, version, best.Version) {
			continue
		}
		if k, err := openKernel(src, pkg, version, filepath.Join(cache, e.Name())); err == nil {
			best = k
		}
	}
	return best
}

// output runs a program and returns what it wrote; its error carries stderr.
func output(ctx context.Context, dir, name string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if errors.Is(err, exec.ErrNotFound) {
			return "", fmt.Errorf("%w; make setup installs what is missing", err)
		}
		return "", fmt.Errorf("%s: %w: %s", name, err, strings.TrimSpace(stderr.String()))
	}
	return stdout.String(), nil
}
