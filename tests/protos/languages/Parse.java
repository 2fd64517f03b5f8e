import com.sun.source.util.JavacTask;
import java.nio.file.Path;
import java.util.List;
import java.util.stream.Stream;
import javax.tools.JavaCompiler;
import javax.tools.ToolProvider;

/** Parses Java files with the compiler's own parser, without resolving names: prints how many, fails on a syntax error. */
class Parse {
  public static void main(String[] paths) throws Exception {
    JavaCompiler compiler = ToolProvider.getSystemJavaCompiler();
    var files = compiler.getStandardFileManager(null, null, null);
    var sources = files.getJavaFileObjectsFromPaths(Stream.of(paths).map(Path::of).toList());
    int[] errors = {0};
    var task =
        (JavacTask)
            compiler.getTask(
                null,
                files,
                diagnostic -> {
                  System.err.println(diagnostic);
                  errors[0]++;
                },
                List.of("-proc:none"),
                null,
                sources);
    int types = 0;
    for (var unit : task.parse()) {
      types += unit.getTypeDecls().size();
    }
    System.out.println(types);
    System.exit(errors[0] == 0 ? 0 : 1);
  }
}
